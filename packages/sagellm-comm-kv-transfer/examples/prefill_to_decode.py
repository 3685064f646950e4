"""Two prefill ranks fill one decode rank's blocks, layer by layer.

Everything runs in one process here; under torchrun the same calls find their peers through the
torch store, and `node_id` is the global rank.
"""

import torch

from sagellm.comm.kv_transfer import KVTransferChannel
from sagellm.core.protocols import CacheGroup, KVLayout, Shard, TransferKey

LAYERS, HEADS, PAGE, DIM, BLOCKS = 4, 8, 16, 64, 32


def layout(tp: int, rank: int) -> KVLayout:
    """What one rank holds: kv_BSHPD, its share of the heads."""
    group = CacheGroup(
        name="kv",
        kind="kv",
        layers=tuple(f"layer{i}" for i in range(LAYERS)),
        axes=("block", "kv", "head", "token", "dim"),
        block_shape=(2, HEADS // tp, PAGE, DIM),
        dtype="bfloat16",
        page_tokens=PAGE,
        shard=Shard("head", rank, tp) if tp > 1 else None,
    )
    return KVLayout((group,), model="example")


def cache(tp: int) -> dict[str, torch.Tensor]:
    """Empty blocks of one rank."""
    shape = (BLOCKS, 2, HEADS // tp, PAGE, DIM)
    return {f"layer{i}": torch.zeros(shape, dtype=torch.bfloat16) for i in range(LAYERS)}


def main() -> None:
    """Send a prompt of 40 tokens from tp=2 to tp=1."""
    key = TransferKey("request-1")
    with KVTransferChannel() as first, KVTransferChannel() as second, KVTransferChannel() as last:
        decoded = cache(tp=1)
        last.register(layout(1, 0), decoded)
        landing = last.receive(key, [7, 0, 9], source_node=[first.node_id, second.node_id])

        streams = []
        computed = []
        for rank, channel in enumerate((first, second)):
            computed.append(cache(tp=2))
            channel.register(layout(2, rank), computed[-1])
            streams.append(channel.begin(key, last.node_id, [1, 2, 3]))
        for layer in range(LAYERS):
            for rank, stream in enumerate(streams):
                blocks = computed[rank][f"layer{layer}"]
                blocks[[1, 2, 3]] = torch.randn_like(blocks[[1, 2, 3]])  # the model's work
                stream.send_layer(layer)
            landing.wait_layer(layer)  # decode may use this layer now
        # a push lands when the whole receive has: seal every stream before waiting for one
        sent = [stream.seal(num_tokens=40) for stream in streams]
        landing.wait()
        for transfer in sent:
            transfer.wait()
        whole = torch.cat([c["layer0"][[1, 2, 3]] for c in computed], dim=2)
        print("equal:", torch.equal(decoded["layer0"][[7, 0, 9]], whole))
        print(landing.metrics)
        print(last.explain(first.node_id))


if __name__ == "__main__":
    main()
