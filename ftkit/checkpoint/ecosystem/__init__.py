"""Our checkpoints in other tools' hands: DCP's storage interface, and the usual file formats."""
