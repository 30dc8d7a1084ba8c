"""From an image file to augmented pixels, one image at a time on the host or a batch at a time on the device."""
