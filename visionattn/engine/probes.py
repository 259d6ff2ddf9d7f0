"""What a feature extractor is worth without training it: probes on its features, and its distance to a teacher."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class RidgeHead:
    """Linear classification of standardised features by ridge regression, in float64.

    The penalty is the one of :data:`_PENALTIES` that is best on the last fifth of a fixed shuffle.

    Args:
        features: (N, C).
        labels: classes, (N,).
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
        fitted, held = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]

        def score(penalty: float) -> float:
            self._solve(features[fitted], labels[fitted], penalty)
            return self.accuracy(features[held], labels[held])

        self.penalty = max(_PENALTIES, key=score)
        self._solve(features, labels, self.penalty)

    def _solve(self, features: Tensor, labels: Tensor, penalty: float) -> None:
        x = features.double()
        self.mean, self.std = x.mean(0), x.std(0) + 1e-6
        x = self._standardised(features)
        gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self.weight = torch.linalg.solve(gram, x.T @ F.one_hot(labels).double())

    def _standardised(self, features: Tensor) -> Tensor:
        return F.pad((features.double() - self.mean) / self.std, [0, 1], value=1.0)

    def predict(self, features: Tensor) -> Tensor:
        """Return the classes of features, (N, C) to (N,)."""
        return (self._standardised(features) @ self.weight).argmax(-1)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of features that are classified right."""
        return (self.predict(features) == labels).double().mean().item()


def nearest_neighbours(
    bank: Tensor, labels: Tensor, features: Tensor, truth: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Return top-1 by the cosine-weighted vote of the nearest features of a bank, as DINO's evaluation does."""
    similar, index = (F.normalize(features, dim=-1) @ F.normalize(bank, dim=-1).T).topk(min(k, len(bank)), -1)
    votes = torch.zeros(len(features), int(labels.max()) + 1, device=features.device)
    votes.scatter_add_(1, labels[index], (similar / temperature).exp().float())
    return (votes.argmax(-1) == truth).double().mean().item()


def pooled(tokens: Tensor) -> Tensor:
    """Return the class token and the mean of the patches side by side, (B, 1 + N, C) to (B, 2 C)."""
    return torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), -1)


class Distance:
    """How far tokens of a student are from those of a teacher, summed up over batches.

    Args:
        mean: the teacher's mean token, (C,): cosines are also taken about it, as what all tokens share flatters them.
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean, self.count = mean, 0
        self.sums = torch.zeros(6, dtype=torch.float64)

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Take tokens of one batch, (B, 1 + N, C), the class token first."""
        x, y = student.float(), teacher.float()
        plain = F.cosine_similarity(x, y, dim=-1)
        about = F.cosine_similarity(x - self.mean, y - self.mean, dim=-1)
        parts = [plain.mean(1), plain[:, 0], about[:, 1:].mean(1), about[:, 0]]
        squares = [(x - y).square().sum((1, 2)), y.square().sum((1, 2))]
        self.sums += torch.stack([part.double().sum() for part in (*parts, *squares)]).cpu()
        self.count += len(x)

    def result(self) -> dict[str, float]:
        """Return mean cosines, of all tokens and of class tokens, plain and about the mean, and the relative error."""
        values = (self.sums[:4] / self.count).tolist()
        names = ("cosine", "cosine_class", "centred_cosine", "centred_cosine_class")
        error = (self.sums[4] / self.sums[5]).sqrt().item()
        return dict(zip(names, values, strict=True)) | {"error": error}


def overlap(found: Tensor, expected: Tensor) -> float:
    """Return the intersection over the union of two maps of values in 0..1, cut at one half."""
    a, b = found > 0.5, expected > 0.5
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


@torch.no_grad()
def collect(forward: Callable[[Tensor], Tensor], images: Iterable[Tensor]) -> Tensor:
    """Return what ``forward`` makes of every batch, one after the other, in half precision."""
    return torch.cat([forward(batch).half() for batch in images])
