// Clips beside each other start together, and begin again together when all have ended.
const together = (event, ready) => {
  const group = event.target.closest?.(".clips");
  const clips = group ? [...group.querySelectorAll("video")] : [];
  if (!clips.length || !clips.every(ready)) return;
  for (const clip of clips) { clip.currentTime = 0; clip.play().catch(() => {}); }
};
document.addEventListener("loadeddata", (event) => together(event, (clip) => clip.readyState >= 2), true);
document.addEventListener("ended", (event) => together(event, (clip) => clip.ended), true);
