"""Jobs: send a run or a sweep to a running Ray head, follow it, bring its exit code back."""
