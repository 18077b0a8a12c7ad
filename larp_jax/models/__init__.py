"""The networks. They take and give arrays; losses, meshes, files and loops live elsewhere."""
