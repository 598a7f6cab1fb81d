"""`DataParallel`: transformations on global arrays. It knows nothing of signs."""
