"""The trainer: `python -m train --model NAME --experiment NAME`."""
