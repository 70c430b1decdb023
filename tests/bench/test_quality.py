import numpy as np
import pytest
import torch

from ossquant.bench.quality import RESAMPLES, Scores, ratio, score, summarize

VOCAB = 640


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a reference and of a candidate near it, (300, 640), and the tokens that follow."""
    generator = torch.Generator().manual_seed(0)
    reference = 6 * torch.randn(300, VOCAB, generator=generator)
    candidate = reference + 0.3 * torch.randn(300, VOCAB, generator=generator)
    return reference, candidate, torch.multinomial(reference.softmax(-1), 1, generator=generator)[:, 0]


def plain(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> dict[str, np.ndarray]:
    """The definitions, written out token by token over probabilities."""
    reference, candidate, tokens = (each.double().numpy() for each in logits)
    columns: dict[str, list[float]] = {name: [] for name in ("kld", "nll", "nll_reference", "delta_p", "same_top")}
    for a, b, token in zip(reference, candidate, tokens.astype(int), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        columns["kld"].append(float((p * np.log(p / q)).sum()))
        columns["nll"].append(-np.log(q[token]))
        columns["nll_reference"].append(-np.log(p[token]))
        columns["delta_p"].append(q[token] - p[token])
        columns["same_top"].append(float(p.argmax() == q.argmax()))
    return {name: np.array(column) for name, column in columns.items()}


def test_scores_are_the_definitions(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure of a token is that of a full softmax in float64, to 1e-9, in pieces of any size."""
    expected = plain(logits)
    for step in (VOCAB * 7, 2**23):
        monkeypatch.setattr("ossquant.bench.quality.STEP_LOGITS", step)
        found = score(*logits)
        for name, column in expected.items():
            np.testing.assert_allclose(getattr(found, name), column, rtol=0, atol=1e-9)


def test_a_model_is_itself(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Against itself a model has a KLD of 0, a PPL ratio of 1 and 100 % same top tokens, without error."""
    reference, _, tokens = logits
    found = summarize(score(reference, reference, tokens), np.arange(300) // 30)
    assert {found[name].value for name in ("kld_mean", "kld_max", "delta_p_mean", "delta_p_rms")} == {0.0}
    assert (found["ppl_ratio"].value, found["same_top"].value) == (1.0, 100.0)
    assert found["kld_mean"].se == found["same_top"].se == found["delta_p_rms"].se == 0


def test_summary_is_llama_perplexitys(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Means, percentiles and errors over independent tokens are those of llama-perplexity's definitions."""
    x = plain(logits)
    n = 300
    found = summarize(Scores(**x), np.arange(n) // 30)

    def error(values: np.ndarray) -> float:
        return float(np.sqrt((np.mean(values**2) - np.mean(values) ** 2) / (n - 1)))

    covariance = (np.mean(x["nll"] * x["nll_reference"]) - x["nll"].mean() * x["nll_reference"].mean()) / (n - 1)
    ln_error = np.sqrt(error(x["nll"]) ** 2 + error(x["nll_reference"]) ** 2 - 2 * covariance)
    ln_ratio = x["nll"].mean() - x["nll_reference"].mean()
    rms, top = np.sqrt(np.mean(x["delta_p"] ** 2)), x["same_top"].mean()
    expected = {
        "kld_mean": (x["kld"].mean(), error(x["kld"])),
        "ppl": (np.exp(x["nll"].mean()), np.exp(x["nll"].mean()) * error(x["nll"])),
        "ln_ppl_ratio": (ln_ratio, ln_error),
        "ppl_ratio": (np.exp(ln_ratio), np.exp(ln_ratio) * ln_error),
        "delta_p_mean": (100 * x["delta_p"].mean(), 100 * error(x["delta_p"])),
        "delta_p_rms": (100 * rms, 100 * 0.5 / rms * error(x["delta_p"] ** 2)),
        "same_top": (100 * top, 100 * np.sqrt(top * (1 - top) / (n - 1))),
    }
    for name, (value, se) in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-9), name
        assert found[name].se_tokens == pytest.approx(se, rel=1e-6), name
    assert found["kld_median"].value == pytest.approx(np.median(x["kld"]))
    assert found["kld_p99"].value == pytest.approx(np.percentile(x["kld"], 99))
    assert found["kld_max"].value == x["kld"].max()


def test_tokens_of_one_text_count_as_one() -> None:
    """Where all tokens of a text are alike, the error is that of the texts, not of the tokens."""
    texts, length = 40, 25
    by_text = np.random.default_rng(0).exponential(size=texts)
    same = np.repeat(by_text, length)
    found = summarize(Scores(same, same, same, same, same), np.repeat(np.arange(texts), length))["kld_mean"]
    assert found.se == pytest.approx(by_text.std(ddof=1) / np.sqrt(texts))
    assert found.se is not None and found.se_tokens is not None and found.se > 4.9 * found.se_tokens


def test_errors_are_what_repetition_shows() -> None:
    """Over repeated draws of texts, the printed errors of the median and of a length ratio are right within 15 %."""
    rng = np.random.default_rng(0)
    medians, printed, ratios, ratio_printed = [], [], [], []
    for _ in range(300):
        kld = (rng.exponential(size=(60, 1)) * rng.exponential(size=(60, 10))).reshape(-1)
        found = summarize(Scores(kld, kld, kld, kld, kld), np.repeat(np.arange(60), 10))["kld_median"]
        medians.append(found.value)
        printed.append(found.se)
        own = rng.uniform(50, 400, 60)
        estimate = ratio(own * rng.uniform(0.7, 1.4, 60), own)
        ratios.append(estimate.value)
        ratio_printed.append(estimate.se)
    assert RESAMPLES >= 100
    assert np.mean(printed) == pytest.approx(np.std(medians), rel=0.15)
    assert np.mean(ratio_printed) == pytest.approx(np.std(ratios), rel=0.15)


def test_one_text_has_no_error() -> None:
    """With a single text there is nothing to estimate an error by text from, and none is given."""
    x = np.random.default_rng(0).random(200)
    found = summarize(Scores(x, x, x, x, x), np.zeros(200, np.int64))
    assert found["kld_mean"].se is found["kld_p99"].se is None
    assert found["kld_mean"].se_tokens is not None
    assert ratio(np.array([3.0]), np.array([2.0])).se is None
