"""From writings to pairs with twins.

Importing any file of this folder settles threads and memory first, before anything imports torch.
"""

import kernels.process  # noqa: F401
