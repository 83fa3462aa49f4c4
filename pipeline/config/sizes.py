"""The recommended sizes by name; plain numbers, so that the config can read them without torch."""

# width, depth, heads (DINOv2 paper, table 17; models/vision_transformer.py)
SIZES: dict[str, tuple[int, int, int]] = {
    "vits": (384, 12, 6),
    "vitb": (768, 12, 12),
    "vitl": (1024, 24, 16),
    "vitg": (1536, 40, 24),
}
