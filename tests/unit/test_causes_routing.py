"""How logits become shares of experts: as transformers does it, whatever groups and biases there are."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from paritykit.diagnose.bench.mixture import Choice
from tests.scenes import numbers


@given(
    groups=st.sampled_from([1, 2, 4]),
    each=st.integers(2, 4),
    chosen=st.integers(1, 3),
    renormalise=st.booleans(),
    data=st.data(),
)
def test_shares_are_those_of_deepseek(
    groups: int, each: int, chosen: int, renormalise: bool, data: st.DataObject
) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    experts, kept = groups * each, data.draw(st.integers(1, groups))
    factor, seed = data.draw(st.sampled_from([1.0, 2.5])), data.draw(st.integers(0, 99))
    chosen = min(chosen, kept * each)
    config = SimpleNamespace(
        num_experts_per_tok=chosen, num_local_experts=experts, hidden_size=5, routed_scaling_factor=factor,
        n_group=groups, topk_group=kept, norm_topk_prob=renormalise,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    bias = 0.3 * numbers(experts, seed=seed + 1)
    router.weight.data.copy_(numbers(experts, 5, seed=seed))
    router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        logits, weights, places = router(numbers(20, 5, seed=seed + 2))
    right = torch.zeros(20, experts).scatter(-1, places, weights)
    choice = Choice(chosen, renormalise, sigmoid=True, factor=factor, bias=tuple(bias.tolist()), groups=groups,
                    kept=kept, best=2)  # fmt: skip
    assert torch.allclose(choice.shares(logits), right, atol=1e-6)


def test_a_bias_that_is_weighed_shows_in_the_shares() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    plain = Choice(2, renormalise=True, sigmoid=True, bias=(9.0, 0.0, 0.0))
    odds = logits.sigmoid()[0, [0, 2]]
    assert torch.allclose(plain.shares(logits)[0, [0, 2]], odds / odds.sum())
    weighed = Choice(2, renormalise=True, sigmoid=True, bias=(9.0, 0.0, 0.0), weighed=True)
    assert weighed.shares(logits)[0, 0] > 0.8
