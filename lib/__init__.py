"""Helper library of the emergent-misalignment study; each module has one concern."""
