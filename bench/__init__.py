"Benchmarks of facelab: each one measures a single claim, and says so in its last line."
