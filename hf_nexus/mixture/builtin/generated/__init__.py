"""Text that is written by a program: mathematics, worded reasoning, structured records and logic puzzles.

Every problem is solved by the code that words it, so its answer is right; numbers, names and phrasing vary. The name
of the source and the index of the document seed each document, so a longer corpus starts with the shorter one.
"""
