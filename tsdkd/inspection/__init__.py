"""What student, teacher and method make of each token of a completion: the table behind the token page."""

from tsdkd.inspection.reader import Reader as Reader
from tsdkd.inspection.reader import inspect_completion as inspect_completion
from tsdkd.inspection.reader import reader_of as reader_of
from tsdkd.inspection.table import COLUMNS as COLUMNS
from tsdkd.inspection.table import TokenTable as TokenTable
