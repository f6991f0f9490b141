"""From judgements to win rates, length held fixed."""
