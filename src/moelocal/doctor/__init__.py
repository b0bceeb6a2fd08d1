"""`moelocal doctor`: which form each op takes and why, measured choices, kernels against their references."""
