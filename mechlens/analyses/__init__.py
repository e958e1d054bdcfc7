"""Model and tokens in, a result out: one file per question."""
