"""Role: which ranks do the same work, told from the coordinates of a device mesh."""

from torch.distributed.device_mesh import DeviceMesh

#: Along these dimensions work differs: each stage has its own layers. Along all others (dp, fsdp,
#: tp, cp, ep) ranks hold shares of the same work.
STAGE_DIMS = frozenset({"pp", "pipe", "pipeline", "stage"})


def of_mesh(mesh: DeviceMesh) -> tuple[str, str]:
    """The role and the place of this rank in `mesh`: ("pp=1", "dp=0 pp=1 tp=0").

    A rank outside the mesh has neither: ("", "").
    """
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        return "", ""
    names = mesh.mesh_dim_names or tuple(f"d{i}" for i in range(len(coordinates)))
    parts = {name: f"{name}={at}" for name, at in zip(names, coordinates, strict=True)}
    role = " ".join(part for name, part in parts.items() if name in STAGE_DIMS)
    return role, " ".join(parts.values())
