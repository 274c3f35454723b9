"""What the local stage is regressed on is the difference of the two MLPs, however it is computed."""

import pytest
import torch
from helpers.random_models import random_model

from tl_adapters.data.traces import Batch
from tl_adapters.local_stage.regression_data import MLPDifferences
from tl_adapters.models.paired_model import PairedModel


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_forward_passs_outputs_give_the_difference(dtype: torch.dtype, backend: str, batch: Batch) -> None:
    """In float32 and wider they are used; in bfloat16 they are rounded, so both MLPs are computed exactly."""
    pair = PairedModel.from_pretrained(random_model(1, dtype), random_model(2, dtype), backend=backend)
    with pair.routed("target"), pair.recorded("mlp.hook_in") as inputs, torch.no_grad():
        pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
    for layer, (x, d) in enumerate(MLPDifferences(pair).read(batch)):
        read, mlp = inputs[layer][batch.counted], pair.mlps[layer]
        assert torch.equal(x, mlp.adapter_input(read))
        expected = mlp.difference(read)
        assert d.dtype == expected.dtype and float(expected.norm()) > 0
        if dtype == torch.bfloat16:
            assert torch.equal(d, expected)
        else:
            torch.testing.assert_close(d, expected)
        outputs = torch.ones(d.shape, dtype=dtype)
        assert torch.equal(mlp.difference(read, outputs), expected) is (dtype == torch.bfloat16)
