"""Making what is trained on: pairs with twins, replies to imitate, lessons, plans.

Importing any file of this folder settles threads and memory first (`kernels/process.py` has the
figures): a command such as `python -m data.build` may come to torch before it comes to nanopersrm.
"""

import kernels.process  # noqa: F401
