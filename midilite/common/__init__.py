"""What every package uses: random draws by key, files, options, transfers, processes."""
