"""Exercise 11: add a data format.

A file has records such as {"query": "2 + 2?", "better": "4", "worse": "5"}; all three values are text.
Describe the format by a row for the table PREFERENCE_FORMATS of dataset/formats.py.
"""

from dataset.formats import Format
from dataset.turns import answers

FORMAT = Format(
    description="",
    example={},
    keys={},
    read=answers(""),
)
