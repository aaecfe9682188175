"""cleanup: what the other passes left unread goes."""

from torch.fx import Graph


def cleanup(graph: Graph) -> None:
    """Remove dead nodes and check the graph, in place."""
    graph.eliminate_dead_code()
    graph.lint()
