"""Forward passes: hooks, clean and patched runs, next-token scans, gradients, sampling."""
