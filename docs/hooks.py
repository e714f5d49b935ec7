"""The site has the folders of the source tree, so that a link leads to the same place in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BESIDE_DOCS = (
    "*.md",
    "benchmarks/README.md",
    "benchmarks/results/*",
    "csrc/README.md",
    "examples/transformers_generate.py",
    "speculative_mamba/models/builtin/README.md",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    mine = [path for pattern in ("docs/**/*.md", "docs/*.png", *BESIDE_DOCS) for path in root.glob(pattern)]
    theme = [file for file in files if file.src_dir != config.docs_dir]
    names = sorted({path.relative_to(root).as_posix() for path in mine if path.is_file()})
    return Files([*theme, *[File(name, str(root), config.site_dir, config.use_directory_urls) for name in names]])
