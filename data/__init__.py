"""From writings to pairs with twins."""

import kernels.process  # noqa: F401  (settles threads and memory, before anything imports torch)
