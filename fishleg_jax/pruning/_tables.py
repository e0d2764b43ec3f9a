"""Tables for a terminal and for a notebook."""

import html
from collections.abc import Sequence


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Formats the lines of a table in plain text.

    Args:
        head: Names of the columns.
        lines: Cells of every line.
        texts: Number of leading columns that are texts, aligned left; the others are numbers.

    Returns:
        The head, a rule and the lines, of equal width.
    """
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def render(line):
        cells = [
            f"{c:<{w}}" if i < texts else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells)

    rule = "-" * (sum(widths) + 2 * (len(head) - 1))
    return [render(head), rule, *map(render, lines)]


def html_table(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int) -> str:
    """Formats the same table in HTML, every cell escaped.

    Args:
        head: Names of the columns.
        lines: Cells of every line.
        texts: Number of leading columns that are texts, aligned left; the others are numbers.

    Returns:
        One `<table>`.
    """

    def render(line, tag):
        cells = [
            f'<{tag} style="text-align: {"left" if i < texts else "right"}">'
            f"{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(line)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(render(line, "td") for line in lines)
    return f"<table><thead>{render(head, 'th')}</thead><tbody>{body}</tbody></table>"


def paragraph(text: str) -> str:
    """Formats a line of text in HTML, escaped."""
    return f"<p>{html.escape(text)}</p>"
