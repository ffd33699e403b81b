"""What fits many GPUs at once is what `fit` says of each."""

from __future__ import annotations

from conftest import MakeTiny
from snugfit.engines.gpus import find_card
from snugfit.planning.fit import fit
from snugfit.planning.served import served_fits


def test_it_agrees_with_fit(make_tiny: MakeTiny) -> None:
    """Longest contexts, headroom and reasons for every engine, one and several GPUs and sequences."""
    model = make_tiny(
        "llama", num_hidden_layers=6, head_dim=128, num_key_value_heads=4, max_position_embeddings=4_194_304
    )
    names = ("RTX 3060", "RTX 5090", "H100")
    cards = [card for name in names if (card := find_card(name)) is not None]
    found = served_fits(model, cards=cards, gpu_counts=(1, 2, 8), sequences=(1, 8))
    assert found.max_positions == 4_194_304
    assert len(found.fits) == len(cards) * 3 * 3 * 2
    lengths = set()
    for one in found.fits:
        if one.tensor_parallel_size == 8:
            assert one.problem is not None  # four heads
            continue
        arguments = {"tensor_parallel_size": one.tensor_parallel_size, "max_num_seqs": one.max_num_seqs}
        record = fit(model, one.card, engine=one.engine, recipes=["fp8-dynamic"], **arguments)
        (row,) = [row for row in record.rows if not row.recipes]
        assert row.problem is None
        assert [cache.max_context for cache in row.caches] == [one.auto, one.fp8]
        assert row.caches[0].headroom_bytes == one.headroom_bytes
        lengths.add(one.auto)
    assert len(lengths) > 6
