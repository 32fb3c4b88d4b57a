"""What quiz_choice.yaml keeps of a quiz."""


def with_choices(rows):
    """The questions for reporting that have wrong choices; the quiz's first line and tier N have none."""
    return rows.filter(lambda row: bool(row.get("choices")) and row.get("split") != "dev")
