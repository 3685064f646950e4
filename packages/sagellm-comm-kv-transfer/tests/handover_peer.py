"""A process of its own that pushes blocks coded with a basis, or hangs while it hands it over.

Arguments: what to do, our node's id, the receiver's id and address, the basis's file.
"""

import sys
import time

from test_coded_transfers import SOURCE, group, memory

from sagellm.comm.kv_transfer import CodecRequest, KVTransferChannel, KVTransferSettings, wire
from sagellm.comm.kv_transfer._link import Link
from sagellm.comm.kv_transfer.compression import BASES
from sagellm.core.protocols import KVLayout, TransferKey

SECRET = b"a key of this test, long enough"
KEY = TransferKey("coded")


def main(act, node, peer, where, path):
    send, pieces = Link.send, []

    def hanging(link, message):
        if isinstance(message, wire.BasisPiece):
            pieces.append(message)
        if act == "hang" and len(pieces) == 2:
            print("hangs", flush=True)
            time.sleep(600)
        send(link, message)

    Link.send = hanging
    fingerprint = BASES.load(path)
    layout = KVLayout((group(),), model="m")
    peers = {int(peer): where}
    settings = KVTransferSettings(transport="tcp")
    with KVTransferChannel(node_id=int(node), peers=peers, key=SECRET, settings=settings) as out:
        out.register(layout, memory(layout))
        request = CodecRequest("transform", {"basis": fingerprint, "step": 0.25})
        out.transfer(SOURCE, int(peer), key=KEY, codec=request, deadline_s=60).wait(60)
    print(len(pieces), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
