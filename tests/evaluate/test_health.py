import math

import numpy as np
import pytest
import torch

from pipeline.evaluate import health


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_feature_std_is_one_for_isotropic_and_zero_for_equal_features():
    assert float(health.feature_std(randn(4000, 64))) == pytest.approx(1, abs=0.01)
    assert float(health.feature_std(randn(1, 64).expand(50, 64))) == pytest.approx(0, abs=1e-4)
    # A common direction: std^2 = 1 - mean cosine. Cosine is 1/2 where the shift is as long as x.
    shifted = randn(4000, 64) + torch.ones(64)
    assert float(health.feature_std(shifted)) == pytest.approx(math.sqrt(0.5), abs=0.02)
    torch.testing.assert_close(health.feature_std(7 * shifted), health.feature_std(shifted))


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_effective_rank_finds_a_planted_rank(rank):
    basis = torch.linalg.qr(randn(32, rank)).Q
    scores = torch.linalg.qr(randn(500, rank + 1)).Q[:, :rank]
    scores = torch.linalg.qr(scores - scores.mean(0)).Q  # equal singular values after centring
    features = 5 + scores @ basis.T
    assert float(health.effective_rank(features)) == pytest.approx(rank, abs=1e-2)


def test_effective_rank_equals_numpy_and_ends_at_nothing():
    x = randn(40, 12) * torch.arange(1, 13)
    values = np.linalg.svd((x - x.mean(0)).double().numpy(), compute_uv=False)
    shares = values / values.sum()
    expected = math.exp(-sum(s * math.log(s) for s in shares))
    assert float(health.effective_rank(x)) == pytest.approx(expected, rel=1e-5)
    assert float(health.effective_rank(randn(1, 12).expand(9, 12))) == 0
    assert float(health.effective_rank(torch.zeros(9, 12))) == 0
    assert math.isnan(float(health.effective_rank(torch.full((9, 12), torch.nan))))


def test_teacher_entropy_equals_a_loop():
    targets = (3 * randn(7, 20)).softmax(1)
    expected = [-sum(p * math.log(p) for p in row) for row in targets.tolist()]
    assert float(health.teacher_entropy(targets)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(health.teacher_entropy(torch.eye(5))) == 0
    assert float(health.teacher_entropy(torch.full((3, 8), 1 / 8))) == pytest.approx(math.log(8))


HEALTHY = {
    "health/teacher_entropy": 6.2,
    "health/student_teacher_kl": 1.1,
    "health/prototypes_used": 40.0,
    "health/feature_std": 0.8,
    "health/effective_rank": 60.0,
    "loss/total": 9.0,
}


def test_no_alarm_for_healthy_or_absent_numbers():
    assert health.alarm(HEALTHY, 65536) is None
    assert health.alarm({}, 65536) is None
    # sharp targets on many prototypes are a clustering, not a collapse
    assert health.alarm(HEALTHY | {"health/teacher_entropy": 0.01}, 65536) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_entropy": 11.08}, ("uniform", "11.090", "teacher.temperature_end")),
        ({"teacher_entropy": 0.01, "prototypes_used": 1.0}, ("same answer", "loss.centring")),
        ({"feature_std": 0.01}, ("hardly tells images apart", "optim.lr")),
        ({"effective_rank": 1.2}, ("about one direction", "loss.koleo_weight")),
        ({"student_teacher_kl": math.nan}, ("student_teacher_kl is nan", "checkpoint")),
        ({"feature_std": math.inf}, ("not finite",)),
    ],
)
def test_one_sentence_says_which_what_and_what_to_do(change, words):
    metrics = HEALTHY | {f"health/{name}": value for name, value in change.items()}
    sentence = health.alarm(metrics, 65536)
    assert sentence is not None and all(word in sentence for word in words)
    assert sentence.startswith("health/") and sentence.endswith(".") and "\n" not in sentence


def test_warming_up_only_finite_numbers_are_asked_for():
    start = HEALTHY | {"health/feature_std": 3e-5}
    assert health.alarm(start, 65536) is not None
    assert health.alarm(start, 65536, warming_up=True) is None
    broken = start | {"health/teacher_entropy": math.nan}
    assert health.alarm(broken, 65536, warming_up=True) is not None


def test_random_prototypes_are_not_called_uniform():
    # the highest temperature, where random logits are flattest: K = 4096, bottleneck of 256
    bottleneck = torch.nn.functional.normalize(randn(64, 256), dim=1)
    prototypes = torch.nn.functional.normalize(randn(4096, 256, seed=1), dim=1)
    entropy = health.teacher_entropy((bottleneck @ prototypes.T / 0.07).softmax(1))
    assert math.log(4096) - float(entropy) > 5 * health.MIN_ENTROPY_GAP
    metrics = HEALTHY | {"health/teacher_entropy": float(entropy)}
    assert health.alarm(metrics, 4096) is None


def test_alarm_names_only_fields_that_exist():
    config = pytest.importorskip("pipeline.config.config")
    for path in (
        "loss.centring",
        "loss.koleo_weight",
        "teacher.temperature",
        "teacher.temperature_end",
        "optim.lr",
        "optim.warmup",
        "optim.global_batch_size",
    ):
        section, field = path.split(".")
        assert hasattr(getattr(config.Config(), section), field)
