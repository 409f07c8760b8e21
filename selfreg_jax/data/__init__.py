"""From medical image files to batches: `prepare` once, then memory-mapped slices, shuffled, augmented on the device."""
