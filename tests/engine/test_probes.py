"""Probes of features against scikit-learn and by hand; the bench of conversions goes on where it stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from visionattn.engine.conversion_bench import Results
from visionattn.engine.probes import Distance, RidgeHead, nearest_neighbours, overlap, pooled
from visionattn.errors import DataError


@pytest.fixture
def classes() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(60)
    return torch.randn(4, 12)[labels] + 1.2 * torch.randn(240, 12), labels


def test_ridge_head_is_that_of_scikit_learn(classes: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = classes
    head = RidgeHead(features, labels)
    x = ((features.double() - features.double().mean(0)) / (features.double().std(0) + 1e-6)).numpy()
    x = np.concatenate((x, np.ones((240, 1))), 1)
    other = Ridge(alpha=head.penalty * 240, fit_intercept=False).fit(x, F.one_hot(labels).double().numpy())
    assert torch.equal(head.predict(features), torch.from_numpy(other.predict(x).argmax(-1)))
    assert 0.6 < head.accuracy(features, labels) < 1


def test_nearest_neighbours_vote_by_cosine(classes: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = classes
    bank, queries = features[:160], features[160:]
    found = NearestNeighbors(n_neighbors=5, metric="cosine").fit(bank.numpy()).kneighbors(queries.numpy())
    right = 0
    for distances, indices, label in zip(*found, labels[160:], strict=True):
        votes = np.zeros(4)
        for distance, index in zip(distances, indices, strict=True):
            votes[labels[index]] += np.exp((1 - distance) / 0.07)
        right += int(votes.argmax() == label)
    assert nearest_neighbours(bank, labels[:160], queries, labels[160:], k=5) == pytest.approx(right / 80)


def test_distance_is_summed_over_batches() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 5, 7, 3)
    mean = teacher.mean((0, 1))
    distance = Distance(mean)
    for start in (0, 2, 4):
        distance.add(student[start : start + 2], teacher[start : start + 2])
    found = distance.result()
    assert found["cosine"] == pytest.approx(F.cosine_similarity(student, teacher, dim=-1).mean().item(), abs=1e-6)
    about = F.cosine_similarity(student - mean, teacher - mean, dim=-1)
    assert found["centred_cosine"] == pytest.approx(about[:, 1:].mean().item(), abs=1e-6)
    assert found["centred_cosine_class"] == pytest.approx(about[:, 0].mean().item(), abs=1e-6)
    assert found["error"] == pytest.approx(((student - teacher).norm() / teacher.norm()).item(), abs=1e-6)


def test_overlap_and_pooling() -> None:
    a, b = torch.tensor([0.9, 0.9, 0.1, 0.1]), torch.tensor([0.9, 0.1, 0.9, 0.1])
    assert overlap(a, b) == pytest.approx(1 / 3)
    tokens = torch.arange(12.0).reshape(1, 3, 4)
    assert pooled(tokens).tolist() == [[0.0, 1.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0]]


def test_results_go_on_where_they_stopped(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    Results(file, {"size": 224}).add(case="relu", seed=0, cosine=0.5)
    again = Results(file, {"size": 224})
    assert again.has(case="relu", seed=0)
    assert not again.has(case="relu", seed=1)
    with pytest.raises(DataError, match="other conditions"):
        Results(file, {"size": 518})
