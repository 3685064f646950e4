"""XML of unknown origin as a small tree: no DTD, no entities, bounded in size, depth and count."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

from sagellm.core.protocols import IntegrityError

__all__ = ["Element", "parse_xml"]

_MAX_BYTES = 32 << 20
_MAX_ELEMENTS = 200_000
_MAX_DEPTH = 200


@dataclass(slots=True)
class Element:
    """One element; text is kept only where there is no child."""

    tag: str
    attrs: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def named(self, tag: str) -> list[Element]:
        """Children of that tag."""
        return [c for c in self.children if c.tag == tag]


def parse_xml(data: bytes, warnings: list[str]) -> Element:
    """The root element; a document that ends early is read up to there, with a warning.

    A document type that only names an outside DTD is passed over and never fetched.

    Raises:
        IntegrityError: No XML, too large or too deep, or it declares or uses entities.

    """
    if len(data) > _MAX_BYTES:
        raise IntegrityError(f"XML of {len(data)} bytes, more than the {_MAX_BYTES} that are read")
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.data
    parser.StartDoctypeDeclHandler = reader.doctype
    parser.EntityDeclHandler = reader.entity
    parser.SkippedEntityHandler = reader.skipped
    parser.ExternalEntityRefHandler = reader.external
    try:
        parser.Parse(data, True)
    except expat.ExpatError as e:
        if reader.root is None:
            raise IntegrityError(f"no XML: {e}") from None
        warnings.append(f"the XML is broken, what comes before is read: {e}")
    except (LookupError, ValueError) as e:  # of the encoding that it declares
        raise IntegrityError(f"XML that cannot be decoded: {e}") from None
    if reader.root is None:
        raise IntegrityError("no XML: no element")
    return reader.root


class _Reader:
    def __init__(self) -> None:
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def start(self, tag: str, attrs: dict[str, str]) -> None:
        self._count += 1
        if self._count > _MAX_ELEMENTS:
            raise IntegrityError(f"XML of more than {_MAX_ELEMENTS} elements")
        if len(self._open) >= _MAX_DEPTH:
            raise IntegrityError(f"XML nested deeper than {_MAX_DEPTH} elements")
        element = Element(tag, attrs)
        if self._open:
            self._open[-1].children.append(element)
        elif self.root is None:
            self.root = element
        self._open.append(element)

    def end(self, tag: str) -> None:
        self._open.pop()

    def data(self, text: str) -> None:
        if self._open and not self._open[-1].children:
            self._open[-1].text += text

    def doctype(
        self, name: str, system_id: str | None, public_id: str | None, has_subset: bool
    ) -> None:
        if has_subset:
            raise IntegrityError(f"XML with a document type of its own ({name}) is not read")

    def entity(self, name: str, *rest: object) -> None:
        raise IntegrityError(f"XML that declares entity {name!r} is not read")

    def skipped(self, name: str, is_parameter: bool) -> None:
        raise IntegrityError(f"XML that uses undeclared entity {name!r} is not read")

    def external(self, *rest: object) -> int:
        raise IntegrityError("XML that refers to an outside entity is not read")
