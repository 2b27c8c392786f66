"""The size of a batch; `tests/unit/gateway/edge/test_connections.py` has what else one request may ask for."""

import pytest

from adytum.inference.gateway.admission import rewrite
from adytum.inference.gateway.limits import LIMITS


@pytest.mark.parametrize("name", ["input", "prompt"])
def test_a_batch_has_at_most_so_many_texts(name: str) -> None:
    rewrite.check_sizes({name: ["x"] * LIMITS.inputs})
    rewrite.check_sizes({name: [1] * (LIMITS.inputs + 1)})  # A list of token numbers is one text.
    with pytest.raises(rewrite.Refused) as refused:
        rewrite.check_sizes({name: ["x"] * (LIMITS.inputs + 1)})
    assert (refused.value.refusal.status, refused.value.refusal.code) == (400, "too_many_values")
