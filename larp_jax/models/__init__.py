"""The networks. They map arrays to arrays; losses, meshes, files and training loops are in other packages."""
