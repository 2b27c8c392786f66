"""Reference values: launch measurements, how they are computed, and signed releases that name them."""
