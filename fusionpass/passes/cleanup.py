"""cleanup: what the other passes left unread goes."""

from torch.fx import Graph

from .caches import blocks_of_slots


def cleanup(graph: Graph) -> None:
    """Write caches as PyTorch would where no kernel does, remove dead nodes and check the graph, in place."""
    blocks_of_slots(graph)
    graph.eliminate_dead_code()
    graph.lint()
