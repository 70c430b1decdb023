"""Tree: elements of HTML and SVG, whose texts and attributes cannot become anything else."""

from xml.etree.ElementTree import Element, tostring

from ossquant.bench.words import plain

Child = Element | str | None


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """Make an element; class_ is class, an underscore in a name a hyphen; None is left out."""
    given = {_name(key): plain(str(value)) for key, value in attributes.items() if value is not None}
    made = Element(tag, given)
    for child in children:
        if isinstance(child, str):
            _append_text(made, plain(child))
        elif child is not None:
            made.append(child)
    return made


def raw_element(tag: str, text: str, **attributes: str) -> Element:
    """Make a script or style of our own text, as it is."""
    made = Element(tag, {_name(key): value for key, value in attributes.items()})
    made.text = text
    return made


def to_text(root: Element) -> str:
    """Write a page."""
    return "<!doctype html>\n" + tostring(root, "unicode", method="html") + "\n"


def _append_text(made: Element, text: str) -> None:
    if len(made):
        made[-1].tail = (made[-1].tail or "") + text
    else:
        made.text = (made.text or "") + text


def _name(key: str) -> str:
    return key if key == "viewBox" else key.rstrip("_").replace("_", "-")
