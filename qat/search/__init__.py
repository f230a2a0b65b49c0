"""Bits for every layer: how much each width of each tensor hurts (`sensitivity`, `hessian`), what it costs (`costs`,
`latency`), and the best choice within a budget (`allocate`), written as a YAML of named rules (`emit`)."""

from qat.search.settings import Search

__all__ = ["Search"]
