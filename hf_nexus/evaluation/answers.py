"""The final answer of a solution, by the convention of GSM8K."""

from decimal import Decimal, InvalidOperation

__all__ = ["ANSWER_MARK", "final_answer"]

ANSWER_MARK = "#### "


def final_answer(text: str) -> Decimal | str | None:
    r"""
    The rest of the line after the last `#### `, without commas, dollar signs and trailing dots; a number if it can be
    read as one, which makes 1 equal to 1.0. `None` if a solution has no final answer.

    Example:
        >>> from hf_nexus.evaluation.answers import final_answer
        >>> final_answer("6 * 7 = 42\n#### $1,042.00."), final_answer("#### blue."), final_answer("It is 42.")
        (Decimal('1042.00'), 'blue', None)
    """
    _, mark, rest = text.rpartition(ANSWER_MARK)
    answer = rest.partition("\n")[0].replace(",", "").replace("$", "").strip().rstrip(".").strip()
    if not mark or not answer:
        return None
    try:
        number = Decimal(answer)
    except InvalidOperation:
        return answer
    return number if number.is_finite() else answer  # the string "nan" equals itself, the number does not
