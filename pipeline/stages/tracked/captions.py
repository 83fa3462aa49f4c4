"""What the pictures of a curation and of `look` show, in words that MLflow shows above them."""

CURATION = {
    "removed": "Images that curation took away, a row for each reason.",
    "copies": "Each row is one image with its copies: the first stays, the framed ones go.",
    "borderline": "Pairs whose similarity is just above or just below the threshold for copies.",
    "leaks": "Training images that are also in an evaluation set, beside their twins there.",
    "seeds": "Seed images, each before the images that were retrieved for it.",
    "clusters": "A row for each of a few clusters: images that are alike.",
    "map": "All images on a plane, alike ones near each other.",
}
LOOK = {
    "attention": "Images beside what the heads of the last block attend to: bright is much.",
    "components": "Images beside the first three principal components of their patches: parts of "
    "one colour are alike to the network.",
    "similarity": "Images beside how alike each patch is to a chosen one: bright is alike.",
    "classes": "Images beside the classes that their patches are nearest to.",
}
