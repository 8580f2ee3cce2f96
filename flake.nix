{
  description = "psyche-fast: a fast trainer for low-communication LLM training";

  # Only the interpreter, the compilers and the C++ library come from here; torch and the rest come
  # from PyPI at the versions of constraints.txt, as without Nix.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.05";

  outputs =
    { self, nixpkgs }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];

      # nix develop .#dev-python --command psyche-fast train --model ...
      #
      # The name is that of Psyche's shell. There is no Rust to rebuild: where Psyche's command goes
      # on with `cargo run --features python --example train --`, ours goes on with
      # `psyche-fast train`, with the same flags.
      shellFor =
        pkgs:
        let
          # What the wheels of torch, numpy and pyarrow link to but do not bring.
          libraries = pkgs.lib.makeLibraryPath [
            pkgs.stdenv.cc.cc.lib
            pkgs.zlib
          ];
        in
        pkgs.mkShell {
          name = "psyche-fast";
          packages = [
            pkgs.python311
            pkgs.gcc # triton compiles its launchers with it
            pkgs.git
            pkgs.gnumake
          ];
          shellHook = ''
            # Nix's Python sets both; the first would leak into .venv, and with the second, which
            # lies before 1980, no wheel can be packed.
            unset PYTHONPATH SOURCE_DATE_EPOCH
            export LD_LIBRARY_PATH="${libraries}''${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
            if [ -d /run/opengl-driver/lib ]; then # NixOS keeps the GPU's driver there
              export LD_LIBRARY_PATH="$LD_LIBRARY_PATH:/run/opengl-driver/lib"
              export TRITON_LIBCUDA_PATH=/run/opengl-driver/lib
            fi
            root=$(git rev-parse --show-toplevel 2>/dev/null || pwd)
            # Prints nothing when .venv is up to date; standard output belongs to --command.
            make --silent --no-print-directory -C "$root" setup PYTHON=python3.11 >&2 || exit 1
            export PATH="$root/.venv/bin:$PATH"
          '';
        };

      shells =
        system:
        let
          shell = shellFor nixpkgs.legacyPackages.${system};
        in
        {
          dev-python = shell;
          default = shell;
        };
    in
    {
      devShells = builtins.listToAttrs (
        map (system: {
          name = system;
          value = shells system;
        }) systems
      );
    };
}
