"""Forward passes: hooks, clean and patched runs, scans over next tokens, gradients, sampling."""
