"""Mixture of experts for the MLP of a block, with ELA's routing-score bias (arXiv 2605.18848, section 5.1)."""

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from visionattn.errors import ConfigError, suggest
from visionattn.ops.precision import widen

SCORE_BIASES = ("none", "outer", "inner")


class MoEMlp(nn.Module):
    """``sum_e S_e ffn_e(x)`` over the ``top_k`` experts that a linear router scores highest; timm's ``mlp_layer``.

    S is the softmax of the router over all experts, cut to the chosen ones and normalised again. An expert is timm's
    Mlp of the given hidden width: as many parameters as the Mlp that it replaces, so a token meets ``top_k`` times as
    many; halve ``mlp_ratio`` with ``top_k=2`` for an equal number. With ``top_k=1`` S is 1, and the router learns only
    from the balance loss and the score bias.

    The paper reuses a slice of the router's weights as the bias of an expert, and finds two ways about equally good:

    - ``outer``: ``sum_e (S_e ffn_e(x) + B_e)``,
    - ``inner``: ``sum_e S_e (ffn_e(x) + B_e)``.

    Which slice B_e is it does not say, and no code of it is published. Here it is the router's own row of weights of
    expert e, which is as wide as a token; this reading is ours.

    Every expert computes every token, and S is 0 where it was not chosen. That is exact, drops no token, gives every
    parameter a gradient, and has shapes that do not depend on the data, so that it compiles, scripts and exports. The
    price is ``experts / top_k`` times the arithmetic of a dispatch by token: these experts add parameters, not speed.

    Options reach a timm model through ``mlp_layer=visionattn.block_layer("MoEMlp", experts=8)``. After a forward in
    training mode, ``balance`` holds the loss described at :func:`balance_loss`. timm's ``fix_init``, on by default in
    NaFlexViT, wants an ``mlp.fc2``; it must be False.

    Args:
        in_features: width of a token.
        hidden_features: hidden width of an expert; ``in_features`` by default.
        out_features: width of the output; ``in_features`` by default.
        act_layer: activation of the experts.
        norm_layer: normalisation of their hidden layer; none by default.
        bias: biases in the experts. The router always has them.
        drop: dropout in the experts.
        device: where parameters are made.
        dtype: their type.
        experts: how many there are.
        top_k: how many of them a token meets.
        score_bias: ``none``, ``outer`` or ``inner``.

    Raises:
        ConfigError: ``top_k`` is not in 1..``experts``, ``score_bias`` is unknown, or it is set while input and output
            differ in width.
    """

    balance: Tensor | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        experts: int = 4,
        top_k: int = 2,
        score_bias: str = "none",
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ConfigError(f"top_k={top_k} with experts={experts}; choose top_k from 1 to the number of experts")
        if score_bias not in SCORE_BIASES:
            raise ConfigError(f"score_bias: got {score_bias!r}; {suggest(score_bias, SCORE_BIASES)}")
        if score_bias != "none" and out_features not in (None, in_features):
            raise ConfigError(
                f"score_bias={score_bias!r} adds weights of width {in_features} to an output of width {out_features}; "
                "make them equal, or set score_bias='none'"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.top_k, self.score_bias = top_k, score_bias
        self.router = nn.Linear(in_features, experts, **factory)
        self.experts = nn.ModuleList(
            Mlp(in_features, hidden_features, out_features, act_layer, norm_layer, bias, drop, **factory)
            for _ in range(experts)
        )
        self.balance = None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., in_features) to (..., out_features)."""
        logits = widen(self.router(x))
        best, index = logits.topk(self.top_k, -1)
        kept = torch.full_like(logits, float("-inf")).scatter(-1, index, best)
        scores, chosen = kept.softmax(-1).to(x.dtype), (kept > float("-inf")).to(x.dtype)
        if self.training:
            self.balance = _balance(logits.softmax(-1), chosen) / self.top_k
        y = x.new_zeros(1)
        for e, expert in enumerate(self.experts):
            y = y + scores[..., e : e + 1] * expert(x)
        if self.score_bias == "outer":
            y = y + chosen @ self.router.weight
        elif self.score_bias == "inner":
            y = y + scores @ self.router.weight
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the balance loss out: it belongs to the graph of one forward pass."""
        return {**self.__dict__, "balance": None}


def balance_loss(model: nn.Module) -> Tensor:
    """Return the sum, over the MoEMlps of a model, of how unevenly their routers spread the last training batch.

    For one of them it is ``experts * sum_e f_e g_e``, with f_e the share of the ``top_k`` slots that went to expert e
    and g_e the mean over tokens of its probability. It is 1 where either is even, the balance that training drives at,
    and ``experts / top_k`` where all tokens go, surely, to the same experts. (1 is no strict bound: routers that are
    sure where they are rare reach a little less.) Gradients flow through g. The paper's code adds 0.01 times this.

    It is 0 for a model without MoEMlp, and for those that have not yet run in training mode. Checkpointing of
    activations must not be re-entrant (timm's is not), for its first pass leaves no graph to differentiate.
    """
    terms = [m.balance for m in model.modules() if isinstance(m, MoEMlp) and m.balance is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    E = probabilities.shape[-1]
    f, g = chosen.to(probabilities.dtype).reshape(-1, E).mean(0), probabilities.reshape(-1, E).mean(0)
    return E * (f * g).sum()
