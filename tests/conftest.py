"""One thread for torch in every test and in the processes that tests start.

The tables here are tiny: threads that spin for each other win nothing, and made a step 15 times slower wherever
something else used a core.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this
