"""Networks: one file each, and how any of them is saved and loaded without pickle."""
