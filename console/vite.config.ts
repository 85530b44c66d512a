import { defineConfig } from "vite";

// Relative paths, as a proxy may serve the console under another path.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../runtime/server/console/static",
    emptyOutDir: true,
    modulePreload: { polyfill: false },
    sourcemap: false,
    cssTarget: ["chrome123", "firefox120", "safari17.5"], // the first with light-dark()
    target: "es2023",
  },
});
