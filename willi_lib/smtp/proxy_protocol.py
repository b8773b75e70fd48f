from dataclasses import dataclass
@dataclass(frozen=True)
class Endpoints:
    source: str
    source_port: int
    destination: str
    destination_port: int
class BadHeader(Exception): pass
def parse(buffer: bytes) -> "tuple[Endpoints | None, int] | None": raise BadHeader
def build_v1(e: Endpoints) -> bytes: raise BadHeader
def build_v2(e: Endpoints) -> bytes: raise BadHeader
