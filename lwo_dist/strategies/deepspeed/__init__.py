"""ZeRO stages 1, 2 and 3: `builder` makes engines, `strategy` trains, `private` wraps internals."""
