"""Codecs of KV cache: plain compressors, lossless splits, fixed rates and coded quantisation.

    with Compressor("quant", step=0.25) as compressor:
        layout = TensorLayout(("layer", "kv", "token", "head", "dim"), rope=RopeSpec.of(128))
        frame = compressor.encode(cache, layout)
        compressor.decode(frame, out=other_cache)

`Compressor` codes tensors whose layout is known into self-describing frames; `create_codec`
gives the codecs of plain bytes that a channel uses for opaque blocks.
"""

from ._registry import (
    CODEC_GROUP as CODEC_GROUP,
    codec_names as codec_names,
    create_codec as create_codec,
    load_codec_spec as load_codec_spec,
    section_codec_spec as section_codec_spec,
)
from .basis import Basis as Basis
from .basis_store import BASES as BASES, BasisStore as BasisStore
from .codec import SectionCodec as SectionCodec
from .compressor import Compressor as Compressor, Decoder as Decoder, Encoder as Encoder
from .frame import Coding as Coding, Entry as Entry, Header as Header
from .generic import Lz4Codec as Lz4Codec, ZstdCodec as ZstdCodec
from .layout import Section as Section, TensorLayout as TensorLayout
from .plain import NoneCodec as NoneCodec
from .rope import RopeSpec as RopeSpec

__all__ = [
    "BASES",
    "CODEC_GROUP",
    "Basis",
    "BasisStore",
    "Coding",
    "Compressor",
    "Decoder",
    "Encoder",
    "Entry",
    "Header",
    "Lz4Codec",
    "NoneCodec",
    "RopeSpec",
    "Section",
    "SectionCodec",
    "TensorLayout",
    "ZstdCodec",
    "codec_names",
    "create_codec",
    "load_codec_spec",
    "section_codec_spec",
]
